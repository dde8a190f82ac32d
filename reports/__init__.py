"""Reports: plots, HTML, Perfetto traces and comparisons, made from run folders alone."""
