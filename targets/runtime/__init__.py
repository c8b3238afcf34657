"""What a device needs: numpy and one inference runtime."""
