"""What every other sub-package may use: errors, files, text, random numbers, devices, processes, clocks, signals."""
