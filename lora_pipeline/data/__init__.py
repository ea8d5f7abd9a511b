"""Pictures and captions on disk, and what training reads of them."""
