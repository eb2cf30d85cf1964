"""What an ARM may be trained by beside the paper's loss: a record for each, and its trainer where that is another."""
