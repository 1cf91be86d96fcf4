"""The exported model against its peers, side by side."""
