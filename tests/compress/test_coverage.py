"""The coverage report, its table and its JSON."""

import json
import math

from dynamoe.compress import Coverage, CoverageReport

PACKED = Coverage(
    path="up", technique="int4", shape=(2, 8, 6), bytes_before=384, bytes_after=144, error=0.125
)  # 48 bytes of codes, 24 scales
LEFT = Coverage(path="norm", technique=None, shape=(8,), bytes_before=32, bytes_after=32, error=0.0)
REPORT = CoverageReport(entries=(PACKED, LEFT))


def test_the_table_tells_of_every_array_and_of_all_together():
    assert str(REPORT).splitlines() == [
        "path   technique          shape   bits  bytes before  bytes after   error",
        "up     int4           2 x 8 x 6  12.00           384          144  0.1250",
        "norm   -                      8  32.00            32           32       -",
        "total  1 of 2 arrays        104  13.54           416          176",
    ]


def test_json_holds_the_same_figures_and_no_number_that_json_does_not_have():
    broken = Coverage(path="b", technique="int4", shape=(2, 2), bytes_before=16, bytes_after=9, error=math.nan)
    data = json.loads(json.dumps(CoverageReport(entries=(PACKED, broken)).to_json(), allow_nan=False))
    assert (data["bytes_before"], data["bytes_after"]) == (400, 153)
    first = {"path": "up", "technique": "int4", "shape": [2, 8, 6], "bytes_before": 384, "bytes_after": 144}
    assert data["arrays"][0] == first | {"error": 0.125, "bits_per_element": 12.0}
    assert data["arrays"][1]["error"] is None
