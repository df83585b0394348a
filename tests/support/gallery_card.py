"""Shell in a guest for examples/pci/e1000.py: Linux' e1000 on a hub, where a virtio-net of the same guest is as well.

The virtio-net is in a network namespace of its own, so that packets between the two leave the guest.
"""

MODULES = ("e1000", "8021q")
DRIVER = {"8086:100e": "e1000"}
CARD_MAC, PEER_MAC = "52:54:00:00:00:01", "52:54:00:00:00:02"

FIND = r"""
card() { ls $(find_device 8086:100e)/net; }
peer() { cat /tmp/peer; }
at_peer() { nsenter -t $(cat /tmp/namespace) -n "$@"; }
statistic() { ethtool -S $(card) | awk -v name="$1:" '$1 == name { print $2 }'; }
# What is sent while the link comes up again is lost.
answers() { again ping -c 1 -W 2 "$@" >/dev/null && echo answers; }
"""

SET_UP = r"""
ls $(find_device 1af4:1041)/virtio*/net >/tmp/peer
unshare -n sleep 1000000 >/dev/null 2>&1 &
echo $! >/tmp/namespace
until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link set $(peer) netns $!
at_peer ip link set $(peer) up
at_peer ip addr add 192.0.2.2/24 dev $(peer)
at_peer ip link add link $(peer) name tagged type vlan id 7
at_peer ip link set tagged up
at_peer ip addr add 198.51.100.2/24 dev tagged
at_peer httpd -p 80 -h /tmp
httpd -p 80 -h /tmp
head -c 100000 /dev/urandom >/tmp/file
"""

USE = r"""
ethtool -i $(card) | grep ^driver
ip link set $(card) up
udhcpc -i $(card) -q -n -t 20 2>&1 | grep -o 'lease of 10.0.2.15 obtained'
answers 10.0.2.2
ethtool $(card) | grep -o 'Speed: .*'
ip addr add 192.0.2.1/24 dev $(card)
sum=$(sha256sum </tmp/file)
[ "$(wget -q -O - http://192.0.2.2/file | sha256sum)" = "$sum" ]
at_peer wget -q -O - http://192.0.2.1/file | sha256sum >/tmp/sum
[ "$(cat /tmp/sum)" = "$sum" ]
ethtool -S $(card) | grep -E 'errors|tx_tcp_seg_failed|dropped' | awk '{ sum += $2 } END { print "errors " sum }'
ip addr flush dev $(card)
"""

# Once only, since each change of the MTU resets the card.
OFFLOADS = r"""
ip addr add 192.0.2.1/24 dev $(card)
sum=$(sha256sum </tmp/file)
cut=$(statistic tx_tcp_seg_good)
[ $cut -gt 0 ] && echo cut by the card
ethtool -K $(card) tso off >/dev/null
at_peer wget -q -O - http://192.0.2.1/file | sha256sum >/tmp/sum
[ "$(cat /tmp/sum)" = "$sum" ]
[ $(statistic tx_tcp_seg_good) = $cut ] && echo cut by Linux
ethtool -K $(card) tso on >/dev/null
ip link add link $(card) name card.7 type vlan id 7
ip link set card.7 up
ip addr add 198.51.100.1/24 dev card.7
answers 198.51.100.2
ip link del card.7
for mtu in 576 9000 16110 1500; do
    ip link set $(card) mtu $mtu
    at_peer ip link set $(peer) mtu $mtu
    answers -s $((mtu - 28)) 192.0.2.2
done
ip addr flush dev $(card)
"""

USED = [
    "driver: e1000",
    "lease of 10.0.2.15 obtained",
    "answers",
    "Speed: 1000Mb/s",
    "errors 0",
]
OFFLOADED = ["cut by the card", "cut by Linux", *["answers"] * 5]
"""What these print."""
