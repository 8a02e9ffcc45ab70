"""The parts of `cfgrl report`: reading run folders, counting, drawing, and the page."""
