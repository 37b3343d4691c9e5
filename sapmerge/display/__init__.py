"""How what was found is shown: tables for a terminal, and pages of pictures for a browser."""
