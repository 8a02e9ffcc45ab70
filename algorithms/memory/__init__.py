"""Using the memory there is: prefixes kept, micro-batches that fit, and the plan of both."""
