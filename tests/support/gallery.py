"""Shell in a guest for the devices of examples/pci: what uses each through the driver that Debian has for it."""

MODULES = ("gpio_pci_idio_16", "8250_pci", "i2c_ismt", "lm75", "at24", "bmp280_i2c", "uio_pci_generic", "nvme")
RAM = 0x1F00_0000
"""Memory that the kernel leaves alone, for a driver in user space: /dev/mem has it."""
APPEND = f"memmap=1M${RAM:#x} rcupdate.rcu_cpu_stall_suppress=1 nosoftlockup"
DRIVERS = {
    "494f:0dc8": "pci-idio-16",
    "1234:16c5": "serial",
    "8086:1f15": "ismt_smbus",
    "1234:5a12": "uio_pci_generic",
    "1234:4e56": "nvme",
}
"""Which driver each device is to be bound to, by its vendor and device."""

# For all that follows: where a device is.
FIND = r"""
find_device() {
    for device in /sys/bus/pci/devices/*; do
        if [ "$(cat $device/vendor):$(cat $device/device)" = "0x${1%:*}:0x${1#*:}" ]; then echo $device; fi
    done
}
irqs() { grep -F -- "$1" /proc/interrupts | awk '{ sum += $2 } END { print sum + 0 }'; }
more_irqs() {
    for try in $(seq 200); do
        [ "$(irqs "$1")" -le "$2" ] || return 0
        sleep 0.05
    done
    echo "no more interrupts of $1 than $2"; return 1
}
# A driver gives a transaction a second at most, and on a busy machine the guest's seconds are short.
again() {
    for try in $(seq 50); do
        if "$@"; then return 0; fi
    done
    echo "fails again and again: $*"; return 1
}
"""

REBIND = r"""
device=$(find_device %(id)s)
driver=/sys/bus/pci/drivers/%(driver)s
for n in $(seq %(times)d); do
    echo ${device##*/} >$driver/unbind
    [ ! -e $device/driver ]
    echo ${device##*/} >$driver/bind
    [ -e $device/driver ]
done
"""

# Outputs are wired to inputs. Linux 6.12's driver takes an interrupt for one of every input, and dies of an input that
# has no handler, so all of them have one.
GPIO = r"""
device=$(find_device 494f:0dc8)
chip=$(ls -d $device/gpio/gpiochip*)
base=${chip##*gpiochip}
cd /sys/class/gpio
cat $chip/label $chip/ngpio
for n in $(seq 16 31); do
    echo $((base + n)) >export
    echo both >IIN$((n - 16))/edge
done
echo $((base + 3)) >export; echo $((base + 12)) >export
seen=$(irqs gpiolib)
for value in 1 0 1; do
    echo $value >OUT3/value
    more_irqs gpiolib $seen
    seen=$(irqs gpiolib)
    echo OUT3 $(cat OUT3/value) IIN3 $(cat IIN3/value)
done
echo 1 >OUT12/value
echo IIN12 $(cat IIN12/value) IIN13 $(cat IIN13/value)
for n in 3 12 $(seq 16 31); do echo $((base + n)) >unexport; done
"""

TTY = r"""
device=$(find_device 1234:16c5)
tty=$(find $device/ -name 'ttyS*')
tty=${tty##*/}
"""

# The other end sends all back.
ECHO = (
    TTY
    + r"""
stty -F /dev/$tty 115200 raw -echo
exec 3<>/dev/$tty
echo hello over the wire >&3
line=
until [ "$line" = "hello over the wire" ]; do read -r line <&3; done   # what a login left may come first
echo "$line"
seq 200 >/tmp/sent
head -c $(stat -c %s /tmp/sent) <&3 >/tmp/came &
cat /tmp/sent >&3
wait
cmp /tmp/sent /tmp/came && echo all of it
exec 3>&-
"""
)

LOGIN = (
    TTY
    + r"""
echo root::19000:0:99999:7::: >/etc/shadow
start-stop-daemon -S -b -x /bin/getty -- -L 115200 $tty vt100
"""
)

I2C = r"""
device=$(find_device 8086:1f15)
bus=$(ls -d $device/i2c-*)
bus=/sys/bus/i2c/devices/${bus##*/}
number=${bus##*-}
chip() {
    echo $1 $2 >$bus/new_device
    if ls -d $bus/$number-00${2#0x}/$3 >/dev/null 2>&1; then return 0; fi
    echo $2 >$bus/delete_device
    return 1
}
store() { echo $1 >$2; }
program() { printf %%s "$1" | dd of=eeprom bs=1 seek=20 conv=notrunc 2>/dev/null; }
contents() { dd if=eeprom of=/tmp/contents bs=1 skip=$1 count=$2 2>/dev/null && cat /tmp/contents; }
again chip lm75 0x48 'hwmon/hwmon*/temp1_input'
again chip 24c02 0x50 eeprom
again chip bmp280 0x76 'iio:device*/in_temp_input'
cd $bus/$number-0048/hwmon/hwmon*
again store 60500 temp1_max
echo lm75 $(again cat temp1_input) $(again cat temp1_max) $(again cat temp1_max_hyst)
cd $bus/$number-0050
again program "over pages: %(text)s"
echo eeprom $(again contents 0 15), $(again contents 20 %(length)d)
cd $bus/$number-0076/iio:device*
echo bmp280 $(again cat in_temp_input) $(again cat in_pressure_input)
for address in 0x48 0x50 0x76; do echo $address >$bus/delete_device; done
grep -o ismt-msi /proc/interrupts
"""

# A driver in shell: a ring of four jobs, of which two are to be done.
ACCELERATOR = r"""
device=$(find_device 1234:5a12)
bar=$(head -n 1 $device/resource | cut -d' ' -f1)
reg() { devmem $((bar + $1)) ${3:-32} $2; }
put() { devmem $((ram + $1)) $3 $2; }
read_ram() { dd if=/dev/mem bs=$2 skip=$(((ram + $1) / $2)) count=1 2>/dev/null; }
ram=%(ram)d
printf '\006\000' | dd of=$device/config bs=1 seek=4 conv=notrunc 2>/dev/null   # memory, bus master, INTx
seq 20000 | head -c 65536 >/tmp/block
dd if=/tmp/block of=/dev/mem bs=65536 seek=$((ram / 65536)) conv=notrunc 2>/dev/null
put 0x20000 $ram 64; put 0x20008 $((ram + 0x21000)) 64; put 0x20010 65536 32; put 0x20014 0 32
put 0x20018 $((ram + 100)) 64; put 0x20020 $((ram + 0x21020)) 64; put 0x20028 0x7fffffff 32; put 0x2002c 0 32
exec 4</dev/uio0
reg 0x04 0; reg 0x08 $((ram + 0x20000)) 64; reg 0x10 4; reg 0x04 1; reg 0x18 2
echo interrupts $(dd bs=4 count=1 <&4 2>/dev/null | wc -c) status $(reg 0x20) head $(reg 0x1c)
echo results $(devmem $((ram + 0x20014))) $(devmem $((ram + 0x2002c)))
[ "$(read_ram 0x21000 32 | hexdump -v -e '1/1 "%%02x"')" = "$(sha256sum /tmp/block | cut -d' ' -f1)" ] && echo digest
reg 0x20 3
echo status $(reg 0x20)
exec 4<&-
"""

# Data there and back, of as many requests of 64 KiB at a time as there are writers; what each has written last.
NVME = r"""
find_disk() {
    device=$(find_device 1234:4e56)
    for try in $(seq 1200); do
        for disk in $device/nvme/nvme*/nvme*n1; do
            disk=/dev/${disk##*/}
            if [ -b $disk ]; then return 0; fi
        done
        sleep 0.05
    done
    echo no namespace; return 1
}
writer() {
    dd if=/dev/urandom of=/tmp/data$1 bs=64k count=4 2>/dev/null
    until [ -e /tmp/enough ]; do
        dd if=/tmp/data$1 of=$disk bs=64k seek=$(($1 * 4)) oflag=direct conv=notrunc 2>/dev/null
        dd if=$disk bs=64k skip=$(($1 * 4)) count=4 iflag=direct 2>/dev/null | cmp - /tmp/data$1
    done
    echo $(sha256sum </tmp/data$1) >/tmp/sum$1
}
find_disk
controller=${disk#/dev/}
controller=/sys/class/nvme/${controller%%n1}
echo $(cat $controller/model $controller/serial) $(cat /sys/block/${disk#/dev/}/size)
rm -f /tmp/enough
for n in 0 1 2 3; do writer $n & done
for turn in $(seq %(resets)d); do
    before=$(cat /sys/block/${disk#/dev/}/stat | awk '{ print $1 + $5 }')
    echo 1 >$controller/reset_controller
    for try in $(seq 2400); do    # until there were requests after it
        [ $(cat /sys/block/${disk#/dev/}/stat | awk '{ print $1 + $5 }') -lt $((before + 16)) ] || break
        sleep 0.05
    done
done
touch /tmp/enough
wait
cat /tmp/sum[0-3] | cut -d' ' -f1
dd if=$disk of=/tmp/all bs=1M count=1 iflag=direct 2>/dev/null
sha256sum </tmp/all | cut -d' ' -f1
printf discarded | dd of=$disk bs=1M seek=8 conv=notrunc,fsync 2>/dev/null
blkdiscard -o $((8 << 20)) -l 1048576 $disk
dd if=$disk bs=1M skip=8 count=1 iflag=direct 2>/dev/null | tr -d '\000' | wc -c
"""
