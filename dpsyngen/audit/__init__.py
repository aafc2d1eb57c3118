"""What an attacker can tell about one image: lower bounds on epsilon from experiments, to hold against the claim."""
