"""What single options of training change: small runs that differ in one option each."""
