"""How the VAE is trained (App. C): its loss, the networks that judge it, the loop."""
