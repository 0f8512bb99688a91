package main

import (
	"context"
	"fmt"
	"os/exec"
	"sync/atomic"
	"time"
)

// faults counts those that were done.
type faults struct {
	killed, closed, restarted int
	repeated                  atomic.Int64 // messages published once more by hand
}

// inject does the faults one after another while orders are placed, spread evenly
// over the orders. After each the shop gets time to work again, so that the
// next one hits a relay that is busy.
func (d *demo) inject(ctx context.Context, services *services) error {
	kill := func() error {
		i := d.faults.killed % len(services.relays)
		services.relays[i].kill()
		d.faults.killed++
		d.say("a relay killed with -9 (%d of 5); starting another", d.faults.killed)
		return services.startRelay(i)
	}
	closeAll := func() error {
		if d.control == "" {
			return nil
		}
		err := d.brokerControl(ctx, "close-connections")
		if err == nil {
			d.faults.closed++
			d.say("all connections closed by the broker (%d of 2)", d.faults.closed)
		} else {
			d.say("connections not closed: %s", err) // a broker of the user's; the table counts
		}
		return ctx.Err()
	}
	restart := func() error {
		if d.control == "" {
			return nil
		}
		d.say("restarting the broker")
		err := d.brokerControl(ctx, "restart-broker")
		if err == nil {
			d.faults.restarted++
			d.say("broker restarted (1 of 1)")
		} else {
			d.say("broker not restarted: %s", err)
		}
		return ctx.Err()
	}
	list := []func() error{kill, closeAll, kill, kill, closeAll, kill, restart, kill}
	for i, fault := range list {
		due := int64((i + 1) * d.orders / (len(list) + 1))
		if err := await(ctx, settleLimit, "orders are placed", func() bool { return d.placed.Load() >= due }); err != nil {
			return err
		}
		if err := services.alive(); err != nil {
			return err
		}
		before := count(ctx, d.ledgerDB, "charges")
		if err := fault(); err != nil {
			return err
		}
		recovered := func() bool {
			charges := count(ctx, d.ledgerDB, "charges")
			return charges >= before+100 || charges >= int64(d.orders)
		}
		if err := await(ctx, settleLimit, "charges go on after a fault", recovered); err != nil {
			return err
		}
	}
	return nil
}

// brokerControl does something to the broker that its clients cannot.
func (d *demo) brokerControl(ctx context.Context, what string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if output, err := exec.CommandContext(ctx, d.control, what).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", d.control, what, err, output)
	}
	return nil
}
