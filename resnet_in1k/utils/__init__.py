"""Files, processes, devices, random numbers and other tools that know nothing of training."""
