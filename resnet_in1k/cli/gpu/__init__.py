"""The parts of the GPU check: in this process, as whole runs, and measurements."""
