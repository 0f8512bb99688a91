package main

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// held: messages come in steps while somebody's transaction keeps what the relay
// deletes; the last step is held against the last of a clean run.
func held(ctx context.Context, b *bench) ([]Result, error) {
	const steps, n = 10, 100_000
	run := func(name string, hold func(*place) (func(), error), drain func(p *place, name, key string) ([]float64, error)) ([]float64, error) {
		p, err := newPlace(ctx, b.databaseURL, b.amqpURL, "held")
		if err != nil {
			return nil, err
		}
		defer p.close(ctx)
		key, err := p.fresh(ctx, name)
		if err != nil {
			return nil, err
		}
		release, err := hold(p)
		if err != nil {
			return nil, err
		}
		defer release()
		rates, err := drain(p, name, key)
		b.say("held, %s: %.0f/s in steps", name, rates)
		return rates, err
	}
	ours := func(p *place, name, key string) ([]float64, error) { return p.steps(ctx, steps, n, name, key) }
	clean, err := run("clean", func(*place) (func(), error) { return func() {}, nil }, ours)
	if err != nil {
		return nil, err
	}
	var results []Result
	for _, c := range []struct {
		name   string
		target float64
		hold   func(*place) (func(), error)
	}{
		{"reader", 0.95, func(p *place) (func(), error) {
			return p.open(ctx, pgx.RepeatableRead, "SELECT count(*) FROM "+p.table("outbox"))
		}},
		{"writer", 0.90, func(p *place) (func(), error) {
			return p.open(ctx, pgx.ReadCommitted, "CREATE TABLE "+p.table("written")+" ()")
		}},
	} {
		rates, err := run(c.name, c.hold, ours)
		if err != nil {
			return nil, err
		}
		var rounds []Round
		for i := range rates {
			rounds = append(rounds, Round{Value: rates[i], Limit: clean[i], Ratio: rates[i] / clean[i]})
		}
		last := rounds[steps-1]
		result := sideBySide(c.name, "msg/s", c.target, rounds)
		result.Value, result.Limit, result.Ratio, result.Met = last.Value, last.Limit, &last.Ratio, last.Ratio >= c.target
		results = append(results, result)
	}
	naive, err := run("naive", func(p *place) (func(), error) {
		return p.open(ctx, pgx.RepeatableRead, "SELECT count(*) FROM "+p.table("outbox"))
	}, func(p *place, name, key string) ([]float64, error) { return p.naive(ctx, steps, n/10, name, key) })
	if err != nil {
		return nil, err
	}
	results[0].Peers = map[string]float64{"naive first step": naive[0], "naive last step": naive[steps-1]}
	return results, nil
}

// open holds a transaction open that has run sql.
func (p *place) open(ctx context.Context, level pgx.TxIsoLevel, sql string) (func(), error) {
	tx, err := p.db.BeginTx(ctx, pgx.TxOptions{IsoLevel: level})
	if err != nil {
		return nil, err
	}
	_, err = tx.Exec(ctx, sql)
	return func() { tx.Rollback(context.WithoutCancel(ctx)) }, err
}

// steps has one relay drain n messages that were committed at once, again and
// again, and returns the rates. The queue is new each time: one that nobody consumes
// grows slower with its length.
func (p *place) steps(ctx context.Context, steps, n int, name, key string) ([]float64, error) {
	r, err := p.relay(ctx)
	if err != nil {
		return nil, err
	}
	var rates []float64
	for i := range steps {
		if err := errors.Join(p.queue(name), p.fill(ctx, n, 10_000, key)); err != nil {
			return nil, errors.Join(err, r.end())
		}
		began := time.Now()
		if err := p.drained(ctx, r, int64((i+1)*n)); err != nil {
			return nil, errors.Join(err, r.end())
		}
		rates = append(rates, float64(n)/time.Since(began).Seconds())
	}
	return rates, r.end()
}

// naive is the relay that everybody writes first: it locks a page, publishes it,
// awaits the confirms, deletes it and commits.
func (p *place) naive(ctx context.Context, steps, n int, name, key string) ([]float64, error) {
	ch, err := p.conn.Channel()
	if err != nil {
		return nil, err
	}
	defer ch.Close()
	if err := ch.Confirm(false); err != nil {
		return nil, err
	}
	var rates []float64
	for range steps {
		if err := errors.Join(p.queue(name), p.fill(ctx, n, 10_000, key)); err != nil {
			return nil, err
		}
		began := time.Now()
		for left := n; left > 0; {
			done, err := p.naivePage(ctx, ch)
			if err != nil || done == 0 {
				return nil, errors.Join(err, errors.New("naive relay: nothing to do"))
			}
			left -= done
		}
		rates = append(rates, float64(n)/time.Since(began).Seconds())
	}
	return rates, nil
}

func (p *place) naivePage(ctx context.Context, ch *amqp.Channel) (n int, err error) {
	tx, err := p.db.Begin(ctx)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback(ctx)
	rows, err := tx.Query(ctx, "SELECT id, message_id::text, exchange, routing_key, payload FROM "+p.table("outbox")+
		" ORDER BY id LIMIT 500 FOR UPDATE SKIP LOCKED")
	if err != nil {
		return 0, err
	}
	var ids []int64
	var confirms []*amqp.DeferredConfirmation
	var id int64
	var messageID, exchange, routingKey string
	var body []byte
	_, err = pgx.ForEachRow(rows, []any{&id, &messageID, &exchange, &routingKey, &body}, func() error {
		confirm, err := ch.PublishWithDeferredConfirm(exchange, routingKey, true, false,
			amqp.Publishing{MessageId: messageID, DeliveryMode: amqp.Persistent, Body: body})
		ids, confirms = append(ids, id), append(confirms, confirm)
		return err
	})
	if err != nil {
		return 0, err
	}
	for _, confirm := range confirms {
		if !confirm.Wait() {
			return 0, errors.New("naive relay: not confirmed")
		}
	}
	if _, err := tx.Exec(ctx, "DELETE FROM "+p.table("outbox")+" WHERE id = ANY($1)", ids); err != nil {
		return 0, err
	}
	return len(ids), tx.Commit(ctx)
}
