"""All of Ray, and the driver: which unit runs next, where, and what a failure means."""
