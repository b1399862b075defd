"""Disk, processes, device, hub: what every command needs."""
