"""What happens to a gradient in whichever space it is given."""
