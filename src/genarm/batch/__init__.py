"""Many prompts, many replies: read the prompts, decode them batch by batch, write rows that survive a kill."""
