"""Training state that lies outside of the device's memory: in host memory, or on an SSD."""
