"""What experiments share: rows that are made once, differences with their errors, and pages."""
