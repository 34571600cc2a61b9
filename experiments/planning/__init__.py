"""Planning a run for a slice or a cluster that is not here: compile its steps, weigh their memory, estimate their time.

`target.py` names the devices, `placement.py` lays a mesh over them, `compiled.py` compiles the steps, `memory.py` says
what fills a device, `network.py` and `roofline.py` estimate the time, `formulas.py` does all that without a compiler,
`search.py` compares meshes, `winner.py` writes the best as a recipe, `report.py` and `pictures.py` show it.
"""
