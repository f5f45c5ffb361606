"""What a plan costs: its step time and memory in closed form, corrected by what is measured."""
