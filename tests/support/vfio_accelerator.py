"""Driver in user space for examples/pci/accelerator.py over Linux' vfio-pci, in the smallest of Perls.

Facts: linux/vfio.h; system calls by their numbers on x86-64. What Perl has no word for, it does by ``syscall``.
"""

from dataclasses import replace
from pathlib import Path

from vfiouser_virtio import vm
from vfiouser_virtio.vm import debian, newc, programs

IOVA = 0x4000_0000
"""Where the driver's memory lies for the device: behind the guest's RAM, so that it is no physical address."""

DRIVER = r"""
my ($slot, $group) = @ARGV;
sub fails { die "$_[0]: $!\n" }
sysopen(my $container, "/dev/vfio/vfio", 2) or fails("container");
sysopen(my $opened, "/dev/vfio/$group", 2) or fails("group");
my $argument = pack("i", fileno $container);
ioctl($opened, 0x3b68, $argument) or fails("VFIO_GROUP_SET_CONTAINER");
ioctl($container, 0x3b66, 1) or fails("VFIO_SET_IOMMU");
my $device = ioctl($opened, 0x3b6a, $slot) or fails("VFIO_GROUP_GET_DEVICE_FD");

my ($iova, $size) = (%(iova)d, 0x10000);
my $memory = syscall(9, 0, $size, 3, 0x22, -1, 0);                          # mmap
my $map = pack("L2Q3", 32, 3, $memory, $iova, $size);
ioctl($container, 0x3b71, $map) or fails("VFIO_IOMMU_MAP_DMA");
sub store {
    my ($at, $data) = @_;
    pipe(my $from, my $to);
    syswrite($to, $data);
    syscall(0, fileno $from, $memory + $at, length $data) == length $data or fails("store");
}
sub load { my ($at, $count) = @_; unpack("P$count", pack("Q", $memory + $at)) }
sub put {
    my ($at, $data) = @_;
    syscall(18, $device, $data, length $data, $at) == length $data or fails("pwrite");
}
sub reg {
    my $data = "\0" x 4;
    syscall(17, $device, $data, 4, $_[0]) == 4 or fails("pread");
    unpack("V", $data);
}

my $event = syscall(290, 0, 0);                                             # eventfd2
sub set_up {
    put((7 << 40) + 4, pack("v", 6));                                       # config space: memory, Bus Master
    my $irqs = pack("L5l", 24, 0x24, 2, 0, 1, $event);
    syscall(16, $device, 0x3b6e, $irqs) == 0 or fails("VFIO_DEVICE_SET_IRQS");
    put(0x04, pack("V", 1));
    put(0x08, pack("Q", $iova + 0x4000));
    put(0x10, pack("V", 4));
}
sub job {
    my ($number, $source, $length) = @_;
    store(0x4000 + 24 * $number, pack("QQVV", $source, $iova + 0x5000, $length, 0));
    put(0x18, pack("V", $number + 1));
    my $count = "\0" x 8;
    syscall(0, $event, $count, 8) == 8 or fails("eventfd");
    my $result = unpack("V", load(0x4000 + 24 * $number + 20, 4));
    print "status ", reg(0x20), " head ", reg(0x1c), " result $result\n";
}
set_up();
store(0, "vfio" x 1000);
job(0, $iova, 4000);
print "digest ", unpack("H*", load(0x5000, 32)), "\n";
put(0x20, pack("V", 3));
job(1, 0x1000, 16);                                                         # RAM of the guest, but not this program's
syscall(16, $device, 0x3b6f, 0) == 0 or fails("VFIO_DEVICE_RESET");
print "reset ", reg(0x20), "\n";
set_up();
job(0, $iova, 4);
my $unmap = pack("L2Q2", 24, 0, $iova, $size);
ioctl($container, 0x3b72, $unmap) or fails("VFIO_IOMMU_UNMAP_DMA");
put(0x20, pack("V", 3));
put(0x18, pack("V", 2));
my $count = "\0" x 8;
syscall(0, $event, $count, 8);
print "unmapped ", reg(0x20), "\n";
"""

SCRIPT = """
device=$(find_device 1234:5a12)
slot=${device##*/}
echo vfio-pci >$device/driver_override
echo $slot >/sys/bus/pci/drivers_probe
group=$(readlink $device/iommu_group)
/perl/lib/ld-linux-x86-64.so.2 --library-path /perl/lib /perl/perl /perl/driver $slot ${group##*/}
"""


def image_with_perl(image: vm.GuestImage, folder: Path) -> vm.GuestImage:
    """The small guest with Perl and the driver."""
    tools = debian.fetch("guest-perl", ["perl-base"], what="the guest's Perl", megabytes=10)
    program = programs.find_program(tools, "perl")
    entries = [
        newc.file("perl/perl", program.read_bytes(), 0o755),
        newc.file("perl/driver", (DRIVER % {"iova": IOVA}).encode()),
        *(
            newc.file(f"perl/lib/{name}", file.read_bytes(), 0o755)
            for name, file in programs.libraries(tools, program).items()
        ),
    ]
    target = folder / "initramfs.cpio"
    target.write_bytes(image.initramfs.read_bytes() + newc.pack(entries))
    return replace(image, initramfs=target)
