# Installs the packages named by its arguments; run by root. Their services stay
# down, now and after the next boot: ours are private ones.
set -eu
exec 9>/var/lock/txbox-install
flock 9

policy=/usr/sbin/policy-rc.d
mark='# of a txbox installation that was cut short: remove me'
if [ ! -e $policy ] || grep -qxF "$mark" $policy; then
	trap 'rm -f $policy' EXIT
	trap 'exit 1' HUP INT TERM
	printf '#!/bin/sh\n%s\nexit 101\n' "$mark" >$policy
	chmod 755 $policy
fi

wanted=
for package; do
	dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' || wanted="$wanted $package"
done
[ -n "$wanted" ] || exit 0

# Erlang's epmd has systemd units of its own, and no init script.
command -v epmd >/dev/null && epmd= || epmd="epmd.service epmd.socket"

export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 $wanted
for service in $wanted; do
	[ ! -e "/etc/init.d/$service" ] || update-rc.d "$service" disable
done
if [ -n "$epmd" ] && command -v epmd >/dev/null && command -v systemctl >/dev/null; then
	systemctl disable $epmd
fi
