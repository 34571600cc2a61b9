"""An option that takes a run's directory, local or remote."""

from typing import Annotated

import tyro

from ..places import Place, parse_place

PlaceOption = Annotated[
    Place,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: parse_place(words[0]),
        is_instance=lambda value: isinstance(value, Place),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""As the type of a field: tyro's own reading of a path makes one slash of the two in gs://."""
