"""What is shown in a terminal: tables, lists, texts, and how far something has come."""
