"""Every backend beside its peers and the machine's limit: `llamac bench`."""
