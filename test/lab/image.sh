#!/bin/sh
# Makes the tree in $1 a lab guest: called by mmdebstrap when all packages are
# installed. What is not needed to boot and to answer the guest agent is off,
# since the guest runs on an emulated processor.
set -eu
root=$1

echo lab >"$root/etc/hostname"
echo "127.0.0.1 localhost lab" >"$root/etc/hosts"
cat >"$root/etc/fstab" <<EOF
LABEL=labroot / ext4 defaults,errors=remount-ro 0 1
LABEL=labdata /data ext4 noauto,x-systemd.automount 0 2
EOF
mkdir "$root/data"
# A fixed machine id: an empty one makes the first boot a slow one.
echo 6c61622d67756573742d686f6c646661 >"$root/etc/machine-id"
chroot "$root" passwd -q -d root

mkdir -p "$root/etc/systemd/network"
cat >"$root/etc/systemd/network/80-lab.network" <<EOF
[Match]
Name=e*
[Network]
DHCP=ipv4
LinkLocalAddressing=no
EOF
chroot "$root" systemctl -q enable systemd-networkd.service
chroot "$root" systemctl -q set-default multi-user.target
for unit in systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer \
	e2scrub_all.timer e2scrub_reap.service fstrim.timer dpkg-db-backup.timer \
	getty@tty1.service systemd-update-utmp.service systemd-update-utmp-runlevel.service \
	systemd-random-seed.service systemd-binfmt.service systemd-pcrphase.service \
	systemd-pcrphase-sysinit.service systemd-machine-id-commit.service \
	sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount dev-mqueue.mount \
	systemd-journal-flush.service systemd-tmpfiles-clean.timer systemd-logind.service \
	modprobe@drm.service modprobe@configfs.service modprobe@efi_pstore.service modprobe@fuse.service \
	modprobe@loop.service modprobe@dm_mod.service sys-fs-fuse-connections.mount sys-kernel-config.mount; do
	ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\n' >"$root/etc/systemd/journald.conf.d/lab.conf"

cat >"$root/etc/systemd/system/guestwriter.service" <<EOF
[Unit]
Description=writes records that can be verified
[Service]
EnvironmentFile=-/run/guestwriter.env
ExecStart=/usr/local/bin/guestwriter write \$GUESTWRITER
EOF

mkdir -p "$root/boot/grub"
cat >"$root/boot/grub/grub.cfg" <<EOF
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
search --no-floppy --label labroot --set=root
linux /vmlinuz root=LABEL=labroot rw console=ttyS0,115200 net.ifnames=0 mitigations=off nowatchdog loglevel=4
initrd /initrd.img
boot
EOF
rm -rf "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/locale/* "$root"/var/cache/apt/*.bin
