"""The demo model, and how it is made."""
