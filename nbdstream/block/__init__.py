"""What holds blocks, behind one interface: raw images, QED images, devices layered on others, remote exports."""
