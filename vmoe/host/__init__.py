"""The process that vmoe runs in: its signals, streams, cores, files and compiler."""
