"""Many small hosts grown side by side in one process: cheap experience for controllers, and its reward."""
