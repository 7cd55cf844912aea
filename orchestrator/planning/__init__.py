"""What a job asks for, and whether it can be had: all that happens before anything is started."""
