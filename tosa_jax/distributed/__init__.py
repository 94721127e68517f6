"""Where programs run: devices, memory, the mesh, several processes, signals, timing.
Models and losses are not here, and models never name the mesh.
"""
