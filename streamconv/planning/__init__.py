"""From nodes to a plan: which bytes are copied or computed, into which file, in what memory."""
