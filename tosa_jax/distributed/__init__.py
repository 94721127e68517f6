"""Where programs run: devices and their memory, the mesh, several processes, signals.
Models never name the mesh; what is computed is elsewhere.
"""
