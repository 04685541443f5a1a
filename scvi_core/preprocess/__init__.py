"""From checked samples to the packed store: quality control, gene selection, and the store itself."""
