"""A merged folder made public: what a run adds to its card, and the upload to the Hub."""
