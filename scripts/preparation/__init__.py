"""What the scripts that prepare data sets share."""
