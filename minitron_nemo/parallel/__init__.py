"""Process groups, layouts, the launch environment, and the one module that knows CPU from GPU."""
