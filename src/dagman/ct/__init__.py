"""Files from hospitals to arrays. No networks."""
