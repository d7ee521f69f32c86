"""What a method gives back: memory, batch, throughput, measured or, without a GPU, modelled."""
