package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

// result is what the databases and the broker hold when all is done.
type result struct {
	orders        map[uuid.UUID]int64   // committed: amount
	declined      []Order               // rolled back
	wire          map[string][]Order    // by message ID: the payload of each time it was published
	ledger, naive map[uuid.UUID][]int64 // by order: the amounts charged
	receipts      map[uuid.UUID][]receipt
	waiting       int64 // messages still in an outbox, parked ones included
}

type receipt struct {
	Order  uuid.UUID
	Amount int64
	Trace  string
}

// declare makes the queues anew, so that nothing of an earlier demo is in them.
func (d *demo) declare() error {
	return d.withChannel(func(ch *amqp.Channel) error {
		for _, queue := range []string{ledgerQueue, naiveQueue, receiptsQueue, tapQueue} {
			if _, err := ch.QueueDelete(queue, false, false, false); err != nil {
				return err
			}
		}
		return topology(ch)
	})
}

func (d *demo) withChannel(do func(*amqp.Channel) error) error {
	conn, err := amqp.Dial(d.amqpURL)
	if err != nil {
		return fmt.Errorf("AMQP_URL: %w", err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	return do(ch)
}

// settle waits until everything that was published has been handled, and stops
// the consumers. What they had not acknowledged then is back in the queues: if
// there is something, they go on.
func (d *demo) settle(ctx context.Context, services *services) error {
	for {
		if err := d.awaitConsumed(ctx); err != nil {
			return err
		}
		if err := services.stopConsumers(); err != nil {
			return err
		}
		var ready int64
		if err := await(ctx, settleLimit, "the broker answers", func() bool { ready = d.queued(); return ready >= 0 }); err != nil {
			return err
		}
		if ready == 0 {
			return services.stopRelays()
		}
		if err := services.startConsumers(); err != nil {
			return err
		}
	}
}

// awaitConsumed waits until everything is published and consumed, for as long as
// there is progress.
func (d *demo) awaitConsumed(ctx context.Context) error {
	var before, now struct{ unpublished, ready, naive, ledger, receipts int64 }
	for {
		err := await(ctx, settleLimit, "any progress", func() bool {
			now.ready, now.unpublished = d.queued(), d.unpublished(ctx)
			now.naive, now.ledger = count(ctx, d.naiveDB, "charges"), count(ctx, d.ledgerDB, "charges")
			now.receipts = count(ctx, d.receiptsDB, "receipts")
			return now != before
		})
		if err != nil {
			return fmt.Errorf("%w; %d messages are not published, %d wait in the queues, the ledger has charged %d of %d orders, %d have a receipt",
				err, now.unpublished, now.ready, now.ledger, d.orders, now.receipts)
		}
		if now.ready == 0 && now.unpublished == 0 && now.ledger >= int64(d.orders) && now.receipts >= int64(d.orders) {
			return nil
		}
		before = now
	}
}

// queued returns the messages that wait in the consumers' queues; -1 if the broker does
// not answer.
func (d *demo) queued() (ready int64) {
	err := d.withChannel(func(ch *amqp.Channel) error {
		for _, name := range []string{ledgerQueue, naiveQueue, receiptsQueue} {
			queue, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
			if err != nil {
				return err
			}
			ready += int64(queue.Messages)
		}
		return nil
	})
	if err != nil {
		return -1
	}
	return ready
}

// unpublished returns -1 if the database does not answer.
func (d *demo) unpublished(ctx context.Context) (all int64) {
	for _, db := range []*pgxpool.Pool{d.ordersDB, d.ledgerDB} {
		pending, parked := count(ctx, db, "txbox.outbox"), count(ctx, db, "txbox.outbox_parked")
		if pending < 0 || parked < 0 {
			return -1
		}
		all += pending + parked
	}
	return all
}

func (d *demo) collect(ctx context.Context, declined []Order) (*result, error) {
	r := &result{declined: declined, orders: map[uuid.UUID]int64{}, waiting: d.unpublished(ctx)}
	rows, err := d.ordersDB.Query(ctx, "SELECT id, amount FROM orders")
	if err != nil {
		return nil, err
	}
	orders, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Order])
	if err != nil {
		return nil, err
	}
	for _, order := range orders {
		r.orders[order.ID] = order.Amount
	}
	if r.ledger, err = charges(ctx, d.ledgerDB); err != nil {
		return nil, err
	}
	if r.naive, err = charges(ctx, d.naiveDB); err != nil {
		return nil, err
	}
	if r.receipts, err = receipts(ctx, d.receiptsDB); err != nil {
		return nil, err
	}
	err = d.withChannel(func(ch *amqp.Channel) error {
		r.wire, err = drain(ctx, ch)
		return err
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

func charges(ctx context.Context, db *pgxpool.Pool) (map[uuid.UUID][]int64, error) {
	rows, err := db.Query(ctx, "SELECT order_id, amount FROM charges")
	if err != nil {
		return nil, err
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Order])
	if err != nil {
		return nil, err
	}
	byOrder := make(map[uuid.UUID][]int64, len(list))
	for _, charge := range list {
		byOrder[charge.ID] = append(byOrder[charge.ID], charge.Amount)
	}
	return byOrder, nil
}

func receipts(ctx context.Context, db *pgxpool.Pool) (map[uuid.UUID][]receipt, error) {
	rows, err := db.Query(ctx, "SELECT order_id, amount, traceparent FROM receipts")
	if err != nil {
		return nil, err
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[receipt])
	if err != nil {
		return nil, err
	}
	byOrder := make(map[uuid.UUID][]receipt, len(list))
	for _, r := range list {
		byOrder[r.Order] = append(byOrder[r.Order], r)
	}
	return byOrder, nil
}

// drain takes what the tap holds.
func drain(ctx context.Context, ch *amqp.Channel) (map[string][]Order, error) {
	tap, err := ch.QueueDeclarePassive(tapQueue, true, false, false, false, nil)
	if err != nil {
		return nil, err
	}
	deliveries, err := ch.ConsumeWithContext(ctx, tapQueue, "", true, false, false, false, nil)
	if err != nil {
		return nil, err
	}
	wire := make(map[string][]Order, tap.Messages)
	timeout := time.After(settleLimit)
	for range tap.Messages {
		select {
		case d, ok := <-deliveries:
			if !ok {
				return nil, errors.New("the tap was closed while it was read")
			}
			var order Order
			if err := json.Unmarshal(d.Body, &order); err != nil {
				return nil, fmt.Errorf("message %s: %w", d.MessageId, err)
			}
			wire[d.MessageId] = append(wire[d.MessageId], order)
		case <-timeout:
			return nil, errors.New("the tap was not read in time")
		}
	}
	return wire, nil
}

// figures are the lines of the table.
type figures struct {
	onWire, wireDuplicates      int
	ledger, ledgerDoubles       int
	naive, naiveDoubles, missed int
}

func (r *result) figures() (f figures) {
	for _, copies := range r.wire {
		f.onWire += len(copies)
		f.wireDuplicates += len(copies) - 1
	}
	f.ledger, f.ledgerDoubles = doubles(r.ledger)
	f.naive, f.naiveDoubles = doubles(r.naive)
	for id := range r.orders {
		if len(r.ledger[id]) == 0 {
			f.missed++
		}
	}
	return f
}

func doubles(charges map[uuid.UUID][]int64) (all, double int) {
	for _, amounts := range charges {
		all += len(amounts)
		double += len(amounts) - 1
	}
	return all, double
}

// verdict is nil if every order that was committed was charged once, for its
// amount, and nothing is known of those that were rolled back.
func (r *result) verdict(placed int) error {
	var broken []string
	check := func(n int, what string) {
		if n != 0 {
			broken = append(broken, fmt.Sprintf("%d %s", n, what))
		}
	}
	f := r.figures()
	published := map[uuid.UUID]int{}
	for _, copies := range r.wire {
		published[copies[0].ID]++
	}
	var unpublished, wrong, unknown, ghosts, unreceipted, untraced int
	for id, amount := range r.orders {
		if published[id] == 0 {
			unpublished++
		}
		if charged := r.ledger[id]; len(charged) > 0 && charged[0] != amount {
			wrong++
		}
		switch sent := r.receipts[id]; {
		case len(sent) != 1 || sent[0].Amount != amount:
			unreceipted++
		case sent[0].Trace != traceOf(id):
			untraced++
		}
	}
	for id := range r.ledger {
		if _, ok := r.orders[id]; !ok {
			unknown++
		}
	}
	for id, messages := range published {
		if _, ok := r.orders[id]; !ok || messages > 1 {
			ghosts++
		}
	}
	check(placed-len(r.orders), "orders accepted but not in the database")
	check(int(r.waiting), "messages left in the outbox")
	check(unpublished, "orders never published")
	check(ghosts, "messages on the wire that no transaction committed")
	check(f.missed, "orders without a charge")
	check(f.ledgerDoubles, "double charges")
	check(wrong, "charges of a wrong amount")
	check(unknown, "charges without an order")
	check(unreceipted, "orders without exactly one receipt")
	check(untraced, "receipts without the trace of their order")
	if broken != nil {
		return errors.New("BROKEN: " + strings.Join(broken, "; "))
	}
	return nil
}

func (r *result) table(done *faults, took time.Duration) string {
	f := r.figures()
	var text strings.Builder
	for _, line := range []struct {
		what  string
		n     any
		after string
	}{
		{"orders committed", len(r.orders), ""},
		{"orders rolled back", len(r.declined), ""},
		{"messages on the wire", f.onWire, ""},
		{"duplicates on the wire", f.wireDuplicates, fmt.Sprintf("  %d of them by hand", done.repeated.Load())},
		{"naive consumer: charges", f.naive, ""},
		{"naive consumer: double charges", f.naiveDoubles, ""},
		{"ledger with inbox: charges", f.ledger, ""},
		{"ledger with inbox: double charges", f.ledgerDoubles, ""},
		{"orders without a charge", f.missed, ""},
		{"receipts", len(r.receipts), ""},
		{"relay killed, connections closed, broker restarted", fmt.Sprintf("%d, %d, %d", done.killed, done.closed, done.restarted), ""},
		{"time", fmt.Sprintf("%.1f s", took.Seconds()), ""},
	} {
		fmt.Fprintf(&text, "%-50s %10v%s\n", line.what, line.n, line.after)
	}
	return text.String()
}
