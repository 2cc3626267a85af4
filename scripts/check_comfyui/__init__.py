"""ComfyUI: our nodes and samplers inside the real program, with tiny random models.

`check_programs.py --comfyui PATH` runs this. The checks of `inside` run in a process that is
ComfyUI's without its server. Those of `server` start the server, on a random port that only this
computer reaches.
"""
