"""Disk, processes, device, hub: what every command needs and no algorithm is about."""
