"""Copies of the sources that packages for servers share."""
