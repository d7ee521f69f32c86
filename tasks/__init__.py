"""Tasks: every one is a folder in MileBench's layout, read, prompted and scored alike."""
