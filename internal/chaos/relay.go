package main

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/relay"
)

// relayLease is short, so that what a fault costs is soon over. With the defaults all is
// right too, only later.
const relayLease = 4 * time.Second

func runRelay(ctx context.Context, db *pgxpool.Pool, o options) error {
	pub, err := relay.RabbitMQ(o.amqpURL, relay.RabbitMQConfig{ConfirmTimeout: relayLease, WriteTimeout: relayLease})
	if err != nil {
		return err
	}
	r, err := relay.New(db, pub, relay.Config{Name: o.name, Lease: relayLease, StopTimeout: 10 * time.Second})
	if err != nil {
		return err
	}
	return r.Run(ctx)
}
