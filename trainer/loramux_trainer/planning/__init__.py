"""What a run will need, measured on a part of it: memory and time before anything large is loaded."""
