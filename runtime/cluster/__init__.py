"""Archives: what one machine, or many, say of more pictures than anybody looks at. See `fbclip.runtime.cluster.score`."""
