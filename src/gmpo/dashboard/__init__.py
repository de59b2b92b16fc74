"""One page that shows what serves, what trains, what is compared, and what is wrong."""
